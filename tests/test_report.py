"""The report of a run: the verdict, what is on the page, and that a browser shows it and asks for nothing."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from PIL import Image
from small_runs import small_config, small_run, stop_after
from test_classification import scores_of

from fcmae.config import (
    ImageConfig,
    PretrainConfig,
    SegmentationConfig,
    load_config,
    parse_config,
    reference_logs,
    to_yaml,
)
from fcmae.report.panels import Panel
from fcmae.report.plots import draw_panel
from fcmae.report.run import curve, read_run
from fcmae.report.verdict import Finding, judge
from fcmae.training.launch import command_line
from fcmae.training.log import MetricsLog
from fcmae.training.run_folder import RunFolder
from fcmae.training.watch import Watch

Run = Callable[..., Path]
REFERENCE = [json.loads(line) for line in reference_logs()["quickstart"].read_text().splitlines()]


@pytest.fixture
def make_run(tmp_path: Path) -> Run:
    """Write a run folder as a quickstart leaves it, with these records."""

    def make(
        records: Sequence[Mapping[str, Any]] = REFERENCE, *overrides: str, starts: Sequence[Mapping[str, Any]] = ()
    ) -> Path:
        folder = tmp_path / "<run> & $1$"
        (folder / "reconstructions").mkdir(parents=True)
        (folder / "config.yaml").write_text(to_yaml(load_config(PretrainConfig, "quickstart", overrides)))
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
        (folder / "starts.jsonl").write_text("".join(f"{json.dumps(start)}\n" for start in starts))
        return folder

    return make


def draw(path: Path, colour: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), colour).save(path)


def texts(run: Path, level: str) -> str:
    return "\n".join(finding.text for finding in judge(read_run(run)) if finding.level == level)


class Page(HTMLParser):
    """The elements of a page: tags, attributes that name other places, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.said = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data


# The verdict


def changed(factor: float = 1.0, **values: float) -> list[dict[str, Any]]:
    """The reference's records with other values."""
    return [record | {"loss": record["loss"] * factor} | values for record in REFERENCE]


def test_a_run_like_the_reference_is_normal_and_finished(make_run: Run) -> None:
    run = make_run()
    assert texts(run, "warning") == ""
    good = texts(run, "good")
    assert "Finished: 750 updates." in good
    assert "The loss is that of the reference log of quickstart at the same step (750: 0.5471" in good


@pytest.mark.parametrize(
    ("factor", "level", "text"),
    [
        (0.96, "good", "4% below the reference log of quickstart"),
        (1.04, "good", "4% above the reference log of quickstart"),
        (1.3, "warning", "30% above the reference log of quickstart"),
        (0.7, "note", "30% below the reference log of quickstart"),
    ],
)
def test_the_loss_is_compared_with_the_reference_in_per_cent(
    make_run: Run, factor: float, level: str, text: str
) -> None:
    assert text in texts(make_run(changed(factor)), level)


def test_the_loss_is_compared_at_the_step_that_was_reached(make_run: Run) -> None:
    run = make_run(REFERENCE[:10])
    assert "at the same step (250:" in texts(run, "good")
    assert "At update 250 of 750" in texts(run, "note")


def test_other_settings_are_named_and_not_called_normal(make_run: Run) -> None:
    run = make_run(changed(0.96), "optim.base_lr=1e-3", "data.root=elsewhere")
    note = texts(run, "note")
    assert "4% below" in note
    assert "optim.base_lr: 0.025 -> 0.001; data.root: docs/photos -> elsewhere" in note
    assert "normal" not in texts(run, "good")


@pytest.mark.parametrize("override", ["model.mask_ratio=0.75", "data.image_size=64", "data.batch_size=4"])
def test_losses_that_mean_another_thing_are_not_compared(make_run: Run, override: str) -> None:
    assert read_run(make_run(REFERENCE, override)).reference is None


def test_photographs_named_from_anywhere_are_those_of_the_reference(make_run: Run) -> None:
    reference = read_run(make_run(REFERENCE, "data.root=/somewhere/docs/photos")).reference
    assert reference is not None
    assert reference.differences == []


def test_a_loss_flat_at_one_is_warned_of_once_the_warm_up_is_over(make_run: Run) -> None:
    assert "The loss stays at 0.995, as if" in texts(make_run(changed(0, loss=0.995)), "warning")


def test_early_on_a_flat_loss_says_little(make_run: Run) -> None:
    run = make_run(changed(0, loss=0.995)[:2])
    assert "stays" not in texts(run, "warning")
    assert "0.9950 to 0.9950, the mean of the last tenth; that says little in fewer than 100" in texts(run, "note")


@pytest.mark.parametrize(
    ("values", "level", "text"),
    [
        ([0.2, 0.21, 0.2], "warning", "The accuracy of k-NN has not risen above its first value, 21.00%"),
        ([0.2], "note", "k-NN accuracy 21.00% at step 0, 20.00% at step 300."),
        ([0.3, 0.4], "good", "k-NN accuracy 21.00% at step 0, 40.00% at step 400."),
        ([0.4, 0.3], "good", "30.00% at step 400; it was 40.00% at step 300."),
    ],
)
def test_k_nn_has_to_rise_above_the_first(make_run: Run, values: list[float], level: str, text: str) -> None:
    evaluated = [{"step": 300 + 100 * i, "knn_top1": value} for i, value in enumerate(values)]
    assert text in texts(make_run([{"step": 0, "knn_top1": 0.21}, *REFERENCE, *evaluated]), level)


def test_waiting_for_data_is_warned_of_with_what_helps_where_the_run_ran(make_run: Run) -> None:
    run = make_run(changed(data_wait=0.31), "data.num_workers=4", starts=[{"step": 0, "cores": 160}])
    said = "31% of the time goes by waiting for images: raise data.num_workers=4, there are 160 cores"
    assert said in texts(run, "warning")
    assert "waiting" not in texts(run, "good") + texts(run, "note")


@pytest.mark.parametrize(("last", "level"), [(0.1, "good"), (0.9, "note")])
def test_waiting_that_is_over_or_little_is_no_warning(make_run: Run, last: float, level: str) -> None:
    waits = [last] * 15 + [0.1] * 15
    run = make_run([record | {"data_wait": wait} for record, wait in zip(REFERENCE, waits, strict=True)])
    assert texts(run, "warning") == ""
    assert f"{np.mean(waits):.0%} of the time was spent waiting for images" in texts(run, level)


@pytest.mark.parametrize("values", [{"loss": 0.995}, {"data_wait": 0.5}, {"loss": 1.1, "data_wait": 0.3}, {}])
def test_a_run_and_its_report_say_the_same_of_the_same_records(
    make_run: Run, tmp_path: Path, values: dict[str, float]
) -> None:
    report = read_run(make_run(changed(**values), "train.max_steps=200", "data.num_workers=0"))
    assert report.plan is not None
    watch = Watch(report.config, report.plan, cores=0)
    log = MetricsLog(RunFolder(tmp_path), 0, loggers=(), watch=watch.see, say=(said := []).append)
    with log:
        for record in report.records:
            log.record(int(record["step"]), {name: value for name, value in record.items() if name != "step"})
    said = [*report.plan.concerns(report.config), *(text.removeprefix("warning: ") for text in said)]
    warned = [finding.text for finding in judge(report) if finding.level == "warning"]
    assert len(said) == 1 + len(values)  # 200 updates are few
    assert [text.lower() for text in warned[: len(said)]] == [f"{text}.".lower() for text in said]


def test_what_wants_something_done_comes_first(make_run: Run) -> None:
    findings = judge(read_run(make_run(changed(1.3, data_wait=0.5))))
    levels = [finding.level for finding in findings]
    assert levels == sorted(levels, key=["warning", "good", "note"].index)
    assert levels.count("warning") == 2


def test_a_run_without_a_record_has_a_report(make_run: Run, command: Command) -> None:
    run = make_run([])
    assert judge(read_run(run)) == [Finding("note", "Nothing is recorded yet.")]
    assert command("report", run)[0] == 0


def test_lines_that_a_kill_or_a_disk_spoilt_are_passed_over(make_run: Run, command: Command) -> None:
    run = make_run()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('1\n{"step": null, "loss": 3}\n{"step": 760, "loss": NaN}\n{"step": 775, "lo')
    assert len(read_run(run).curve("loss").steps) == len(REFERENCE)
    assert command("report", run)[0] == 0


# The page


def test_the_page_says_what_ran_by_which_command_and_on_what(make_run: Run, command: Command) -> None:
    starts = [
        {"time": 1.8e9, "step": 0, "command": "fcmae pretrain --config quickstart", "device": "cpu, 2 threads"},
        {"time": 1.8e9, "step": 250, "command": "fcmae pretrain 'a b' resume=auto", "device": "an <H200>"},
    ]
    run = make_run(starts=starts)
    code, out, _ = command("report", run)
    assert code == 0
    text = (run / "report.html").read_text()
    assert f"report.html  {len(text.encode()):,} bytes" in out
    page = Page(text)
    assert page.open == []
    for said in (
        "<run> & $1$",
        "fcmae pretrain --config quickstart",
        "resumed after update 250, 2027-01-15 08:00 UTC",
    ):
        assert said in page.said
    for said in ("fcmae pretrain 'a b' resume=auto", "an <H200>", "ConvNeXt V2 atto", "base_lr: 0.025"):
        assert said in page.said


def test_a_page_names_nothing_that_is_not_in_it(make_run: Run, command: Command) -> None:
    run = make_run()
    draw(run / "reconstructions" / "step-00000000.png", "red")
    draw(run / "reconstructions" / "mask-ratio-0.60.png", "blue")
    assert command("report", run)[0] == 0
    text = (run / "report.html").read_text()
    assert all(link.startswith(("data:", "#")) for link in Page(text).links)
    assert {*re.findall(r"\w+://[\w./-]+", text)} <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_pictures_come_by_step_the_first_and_last_among_them_and_those_at_mask_ratios_besides(
    make_run: Run, command: Command
) -> None:
    run = make_run()
    for step in [*range(0, 2000, 10), 99_999_999]:
        draw(run / "reconstructions" / f"step-{step:08d}.png", "red")
    for ratio in (0.9, 0.3, 0.75):
        draw(run / "reconstructions" / f"mask-ratio-{ratio:.2f}.png", "blue")
    assert command("report", run)[0] == 0
    text = (run / "report.html").read_text()
    shown = re.findall(
        r"<figcaption>after update ([\d,]+)</figcaption><img|<figcaption>after update ([\d,]+)", text
    )
    steps = [int((a or b).replace(",", "")) for a, b in shown]
    assert len(steps) == 16
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 99_999_999)
    assert "<h2>Mask ratios</h2>" in text
    assert re.findall(r"<figcaption>(\d+%) of the patches masked", text) == ["30%", "75%", "90%"]


def test_every_figure_of_the_records_is_drawn_and_the_reference_beside_loss_and_rate(
    make_run: Run, command: Command
) -> None:
    records = [
        record | {"cosine_distance/stage_1": 0.4, "grad_norm": 1.0, "something": 2.0} for record in REFERENCE
    ]
    run = make_run([{"step": 0, "knn_top1": 0.2, "knn_top5": 0.5}, *records])
    assert command("report", run)[0] == 0
    text = (run / "report.html").read_text()
    titles = re.findall(r'<svg role="img" aria-label="([^"]+)"', text)
    assert titles == [
        "training loss",
        "learning rate",
        "k-NN accuracy",
        "cosine distance between channels",
        "norm of the gradient",
        "something",
        "images per second",
        "time spent waiting for images",
    ]
    assert text.count(">reference<") == 2


def test_the_colours_of_curves_are_the_pages() -> None:
    drawn = draw_panel(Panel("a $title$ of <b>", {"this run": curve(REFERENCE, "loss")}))
    assert "var(--series-1)" in drawn
    assert "var(--ink)" in drawn
    assert not re.findall(r"#[0-9a-f]{6}(?=[;\"])", drawn)
    assert "a $title$ of &lt;b&gt;" in drawn


def test_the_same_run_gives_the_same_page_but_for_the_time(make_run: Run, command: Command) -> None:
    run = make_run()
    pages = []
    for _ in range(2):
        assert command("report", run, "--overwrite")[0] == 0
        pages.append(re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", (run / "report.html").read_text()))
    assert pages[0] == pages[1]


SCORES = {
    "weights": "RUN/checkpoints/best/ema.safetensors",
    "images": 100,
    "miou": 0.5,
    "pixel_accuracy": 0.75,
    "loss": 0.6,
    "classes": {"names": ["sky", "<sea>"], "pixels": [9000, 1000], "iou": [0.7, None], "recall": [0.8, 0.4]},
}


@pytest.fixture
def segmenter(tmp_path: Path) -> Path:
    """The run folder of a segmenter, evaluated."""
    run = tmp_path / "segmenter"
    values = {"task": "segmentation", "output": str(run), "model": {"variant": "atto"}, "data": {"root": "x"}}
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(parse_config(SegmentationConfig, values, "a test")))
    records = [{"step": step, "val_miou": step / 40, "ema_miou": step / 20, "val_loss": 1.0} for step in (5, 10)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (run / "evaluation.json").write_text(json.dumps(SCORES))
    for step in (5, 10):
        draw(run / "predictions" / f"step-{step:08d}.png", "green")
    draw(run / "iou.png", "blue")
    return run


def test_a_segmenters_page_has_overlays_scores_and_classes_the_worst_first(
    segmenter: Path, command: Command
) -> None:
    code, out, _ = command("report", segmenter)
    assert code == 0
    assert "mIoU of the EMA: 50.00% at step 10" in out
    page = Page((segmenter / "report.html").read_text())
    assert sum(link.startswith("data:image/webp") for link in page.links) == 3
    assert page.said.index("<sea>") < page.said.index("70.0%")
    for said in ("Predictions", "IoU by class", "75.00%", "mIoU, validation", "fine-tuning, segmentation"):
        assert said.lower() in page.said.lower()


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """The run folder of a classifier, evaluated."""
    run = tmp_path / "classifier"
    values = {"output": str(run), "model": {"variant": "atto"}, "data": {"root": "x"}}
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(parse_config(ImageConfig, values, "a test")))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 5, "val_top1": 0.4}))
    scores = scores_of(torch.randn(80, 3), torch.randint(3, (80,)))
    (run / "evaluation.json").write_text(json.dumps({"weights": "w"} | scores.tabulate(["cat", "dog", "<fox>"])))
    for name in ("confusion.png", "mistakes.png"):
        draw(run / name, "blue")
    return run


def test_a_classifiers_page_has_confusion_mistakes_and_calibration(classifier: Path, command: Command) -> None:
    assert command("report", classifier)[0] == 0
    text = (classifier / "report.html").read_text()
    page = Page(text)
    assert sum(link.startswith("data:image/webp") for link in page.links) == 2
    for said in (
        "Confusion matrix",
        "Worst mistakes, each with its class and how sure the network was of another",
        "Calibration",
        "<fox>",
    ):
        assert said in page.said
    assert 'aria-label="calibration, error ' in text


def test_mistakes_of_an_evaluation_without_any_are_not_shown(classifier: Path, command: Command) -> None:
    scores = json.loads((classifier / "evaluation.json").read_text())
    (classifier / "evaluation.json").write_text(json.dumps(scores | {"mistakes": []}))
    assert command("report", classifier)[0] == 0
    assert "Worst mistakes" not in (classifier / "report.html").read_text()


def test_evaluations_of_before_say_what_they_have_not_kept(classifier: Path, command: Command) -> None:
    scores = json.loads((classifier / "evaluation.json").read_text())
    del scores["calibration"], scores["mistakes"], scores["confusion"]
    (classifier / "evaluation.json").write_text(json.dumps(scores))
    assert command("report", classifier)[0] == 0
    said = Page((classifier / "report.html").read_text()).said
    assert f"worst mistakes and calibration: fcmae finetune --evaluate {classifier}" in said


def test_a_run_that_was_not_evaluated_names_the_command_that_does(segmenter: Path, command: Command) -> None:
    (segmenter / "evaluation.json").unlink()
    assert command("report", segmenter)[0] == 0
    assert f"fcmae finetune --evaluate {segmenter}" in Page((segmenter / "report.html").read_text()).said


@pytest.mark.parametrize("kind", ["pretraining", "finetuning"])
def test_runs_of_0_1_0_have_reports(kind: str, tmp_path: Path, command: Command) -> None:
    file = tmp_path / "new" / "report.html"
    assert command("report", Path(__file__).parent / "data" / "0.1.0" / kind, "--output", file)[0] == 0
    said = Page(file.read_text()).said
    assert "0.1.0" in said
    assert "the command line" in said


# What is refused


def test_what_is_no_run_is_refused_in_a_line(tmp_path: Path, command: Command) -> None:
    code, _, error = command("report", tmp_path)
    assert (code, error) == (
        2,
        f"error: {tmp_path}: no run folder, it has no config.yaml; name the output of a run\n",
    )


def test_a_file_that_is_there_stays_unless_overwrite_is_said(
    make_run: Run, tmp_path: Path, command: Command
) -> None:
    run, file = make_run(), tmp_path / "mine.html"
    file.write_text("mine")
    code, _, error = command("report", run, "--output", file)
    assert code == 2
    assert error.startswith(f"error: {file}: exists already")
    assert file.read_text() == "mine"
    assert command("report", run, "--output", file, "--overwrite")[0] == 0
    assert file.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("content", ["{", '{"classes": []}', '{"classes": {"names": ["a"], "iou": "much"}}'])
def test_a_damaged_evaluation_is_named_with_its_remedy(segmenter: Path, command: Command, content: str) -> None:
    (segmenter / "evaluation.json").write_text(content)
    code, _, error = command("report", segmenter)
    assert code == 2
    assert "evaluation.json: damaged" in error
    assert f"fcmae finetune --evaluate {segmenter}" in error


def test_a_picture_that_a_disk_spoilt_is_named_with_its_remedy(make_run: Run, command: Command) -> None:
    run = make_run()
    picture = run / "reconstructions" / "step-00000000.png"
    draw(picture, "red")
    picture.write_bytes(picture.read_bytes()[:60])
    code, _, error = command("report", run)
    assert code == 2
    assert error.startswith(f"error: {picture}: not a whole picture: ")
    assert "remove it" in error


# What a run notes


def test_a_run_notes_the_command_of_each_start(tmp_path: Path) -> None:
    small_run(small_config(tmp_path / "whole"))
    stopped = stop_after(tmp_path / "whole", 4, tmp_path / "stopped")
    small_run(small_config(stopped))
    small_run(small_config(stopped))  # finished already, so not started
    starts = read_run(stopped).starts
    assert [start["step"] for start in starts] == [0, 4]
    assert [start["command"] for start in starts] == [command_line()] * 2
    assert {"time", "device", "precision", "batch", "python"} <= starts[0].keys()


# In a browser


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_a_browser_shows_the_page_at_any_width_and_asks_for_nothing(
    make_run: Run, command: Command, browser: Any, scheme: str, width: int
) -> None:
    run = make_run()
    for step, colour in ((0, "red"), (250, "green"), (750, "blue")):
        draw(run / "reconstructions" / f"step-{step:08d}.png", colour)
    for ratio in (0.3, 0.6, 0.9):
        draw(run / "reconstructions" / f"mask-ratio-{ratio:.2f}.png", "blue")
    assert command("report", run)[0] == 0
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((run / "report.html").resolve().as_uri())
    assert not said
    assert [url for url in asked if not url.startswith("data:")] == [(run / "report.html").resolve().as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    shades = [int(value) for value in re.findall(r"\d+", background)]
    assert (np.mean(shades) > 128) == (scheme == "light")
    shown = page.locator("figure:visible figcaption")
    assert shown.all_inner_texts() == ["after update 750", "60% of the patches masked"]
    page.get_by_role("slider", name="Reconstructions over training time").fill("0")
    page.get_by_role("slider", name="Mask ratios from low to high").fill("2")
    assert shown.all_inner_texts() == ["after update 0", "90% of the patches masked"]
    context.close()


@pytest.mark.browser
def test_without_javascript_all_pictures_are_there(make_run: Run, command: Command, browser: Any) -> None:
    run = make_run()
    for step in (0, 250):
        draw(run / "reconstructions" / f"step-{step:08d}.png", "red")
        draw(run / "reconstructions" / f"mask-ratio-{0.3 + step / 1000:.2f}.png", "blue")
    assert command("report", run)[0] == 0
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((run / "report.html").resolve().as_uri())
    assert page.locator("figure:visible").count() == 4
    assert page.locator("svg:visible").count() == 4
    context.close()
