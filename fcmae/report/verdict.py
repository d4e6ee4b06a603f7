"""What a run's figures mean, in words: finished, learning, as the reference, waiting for data; reads no files."""

from typing import Literal, NamedTuple

from fcmae.report.panels import COLLAPSE, keys_of
from fcmae.report.run import Curve, Run, curve
from fcmae.training.watch import KNN, MOST_WAIT

ALIKE = 0.1
"""By which share losses of the same settings differ for other reasons: another seed, processor or version."""
PART = 0.1
"""Of the way so far, over which the last losses are averaged."""


class Finding(NamedTuple):
    """A sentence, and how good it is."""

    level: Literal["good", "note", "warning"]
    text: str


def judge(run: Run) -> list[Finding]:
    """Return what is to be said of a run, what wants something done first: what the run itself said, and more."""
    watch = run.watch
    wrong = watch.found if watch else {}
    concerns = run.plan.concerns(run.config) if run.plan else []
    found = [Finding("warning", f"{text[:1].upper()}{text[1:]}.") for text in (*concerns, *wrong.values())]
    found += _progress(run)
    if "loss" not in wrong:
        found += _loss(run, watch.settled if watch else 0)
    found += _reference(run)
    found += _features(run, says_knn=KNN not in wrong)
    found += _scores(run)
    if "data_wait" not in wrong:
        found += _waiting(run)
    found += _bad_images(run)
    return sorted(found, key=lambda finding: ["warning", "good", "note"].index(finding.level))


def _last_part(curve: Curve, end: float) -> Curve:
    """Return the end of a curve up to a step, at least its last point before."""
    before = curve.steps <= end
    chosen = before & (curve.steps > end * (1 - PART))
    chosen[before.nonzero()[0][-1:]] = True
    return Curve(curve.steps[chosen], curve.values[chosen])


def _progress(run: Run) -> list[Finding]:
    if not run.records or run.plan is None:
        return [Finding("note", "Nothing is recorded yet.")]
    total = run.plan.total_steps
    if run.step >= total:
        return [Finding("good", f"Finished: {total:,} updates.")]
    text = f"At update {run.step:,} of {total:,}; if it has stopped, the same command with resume=auto goes on."
    return [Finding("note", text)]


def _loss(run: Run, settled: int) -> list[Finding]:
    losses = run.curve("loss")
    if len(losses.steps) < 2:
        return []
    first, last = losses.values[0], _last_part(losses, losses.steps[-1]).values.mean()
    text = f"from {first:.4f} to {last:.4f}, the mean of the last tenth"
    if losses.steps[-1] <= settled:
        return [Finding("note", f"The loss went {text}; that says little in fewer than {settled:,} updates.")]
    if last >= first:
        return [Finding("note", f"The loss went {text}.")]
    return [Finding("good", f"The loss falls: {text}.")]


def _reference(run: Run) -> list[Finding]:
    """Compare the loss with the reference log at the same step."""
    reference = run.reference
    if reference is None:
        return []
    own, other = run.curve("loss"), curve(reference.records, "loss")
    end = min(own.steps[-1], other.steps[-1]) if own and other else 0
    if not end or own.steps[0] > end:
        return []
    part = _last_part(own, end)
    mine, theirs = part.values.mean(), other.at(part.steps).mean()
    gap = mine / theirs - 1
    side = f"{abs(gap):.0%} {'above' if gap > 0 else 'below'}" if abs(gap) >= 0.005 else "that of"
    what = (
        f"The loss is {side} the reference log of {reference.name} at the same step "
        f"({end:,.0f}: {mine:.4f}, there {theirs:.4f})"
    )
    if reference.differences:
        return [Finding("note", f"{what}; but the settings are others: {'; '.join(reference.differences)}.")]
    if gap > ALIKE:
        return [Finding("warning", f"{what}: more than seeds and processors differ. Compare the versions below.")]
    if gap < -ALIKE:
        return [Finding("note", f"{what}: better than seeds and processors differ. Are these the same images?")]
    return [Finding("good", f"{what}: normal.")]


def _features(run: Run, *, says_knn: bool) -> list[Finding]:
    found = []
    if says_knn and len((knn := run.curve(KNN)).steps) > 1:
        first, last, best = knn.values[0], knn.values[-1], knn.values.max()
        text = f"k-NN accuracy {first:.2%} at step {knn.steps[0]:,.0f}, {last:.2%} at step {knn.steps[-1]:,.0f}"
        if best > max(first, last):
            text += f"; it was {best:.2%} at step {knn.steps[knn.values.argmax()]:,.0f}"
        found.append(Finding("good" if last > first else "note", f"{text}."))
    stages = [run.curve(key) for key in sorted(keys_of(run.records, COLLAPSE))]
    if ends := [f"{stage.values[0]:.2f} to {stage.values[-1]:.2f}" for stage in stages]:
        text = f"Cosine distance between channels, by stage: {', '.join(ends)}. Towards 0 is feature collapse."
        found.append(Finding("note", text))
    return found


def _scores(run: Run) -> list[Finding]:
    """Say how well a fine-tuned network does, by the figure that `best` goes by."""
    if run.scores is None:
        return []
    figure = run.scores.overall[0]
    found = []
    for prefix, whose in (("ema", " of the EMA"), ("val", "")):
        if scores := run.curve(f"{prefix}_{figure.key}"):
            best = scores.values.argmax()
            text = f"{figure.title}{whose}: {figure.show(scores.values[-1])} at step {scores.steps[-1]:,.0f}"
            if scores.values[best] > scores.values[-1]:
                text += f", best {figure.show(scores.values[best])} at step {scores.steps[best]:,.0f}"
            rises = scores.values[best] > scores.values[0]
            found.append(Finding("good" if rises else "note", f"{text}."))
    return found


def _waiting(run: Run) -> list[Finding]:
    if not (waits := run.curve("data_wait")):
        return []
    share = waits.values.mean()
    text = f"{share:.0%} of the time was spent waiting for images"
    return [Finding("good", f"{text}: loading keeps up.") if share <= MOST_WAIT else Finding("note", f"{text}.")]


def _bad_images(run: Run) -> list[Finding]:
    if run.state is None or not run.state.bad_images:
        return []
    names = [name for _, name, _ in run.state.bad_images[:3]] + ["..."] * (len(run.state.bad_images) > 3)
    return [Finding("note", f"{len(run.state.bad_images)} images did not decode: {', '.join(names)}.")]
