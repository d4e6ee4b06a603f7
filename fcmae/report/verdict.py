"""What a run's figures mean, in words: finished, learning, as the reference, waiting for data; reads no files."""

from typing import Literal, NamedTuple

from fcmae.config import PretrainConfig
from fcmae.report.run import Curve, Run, curve

FLAT = 0.98
"""Of a loss of normalised patches, whose variance is 1: above it nothing but their mean was predicted."""
ALIKE = 0.1
"""By which share losses of the same settings differ for other reasons: another seed, processor or version."""
MUCH_WAITING = 0.2
"""Share of the time spent waiting for images."""
PART = 0.1
"""Of the way so far, over which the last losses are averaged."""


class Finding(NamedTuple):
    """A sentence, and how good it is."""

    level: Literal["good", "note", "warning"]
    text: str


def judge(run: Run) -> list[Finding]:
    """Return what is to be said of a run, what wants something done first."""
    found = [*_progress(run), *_loss(run), *_reference(run), *_features(run), *_scores(run), *_data(run)]
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


def _loss(run: Run) -> list[Finding]:
    losses = run.curve("loss")
    if len(losses.steps) < 2:
        return []
    first, last = losses.values[0], _last_part(losses, losses.steps[-1]).values.mean()
    warmed_up = run.plan is None or losses.steps[-1] > run.plan.warmup_steps
    config = run.config
    pretraining = isinstance(config, PretrainConfig)
    if pretraining and config.model.norm_pix_loss and config.model.target == "pixels" and last > FLAT:
        text = f"The loss is flat at {last:.3f}: nothing but the mean of a patch is predicted."
        if warmed_up:
            return [Finding("warning", f"{text} Try optim.base_lr three times lower, and three times higher.")]
        return [Finding("note", f"{text} The warm-up is not over, so that says little.")]
    if last >= first:
        text = f"The loss has not fallen: {first:.4f} to {last:.4f}. Try a lower optim.base_lr."
        return [Finding("warning", text)]
    return [Finding("good", f"The loss falls: {first:.4f} to {last:.4f}, the mean of the last tenth.")]


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


def _features(run: Run) -> list[Finding]:
    found = []
    if len((knn := run.curve("knn_top1")).steps) > 1:
        first, last, best = knn.values[0], knn.values[-1], knn.values.max()
        text = f"k-NN accuracy {first:.2%} before training, {last:.2%} at step {knn.steps[-1]:,.0f}"
        if last > first:
            higher = f"; it was {best:.2%} at step {knn.steps[knn.values.argmax()]:,.0f}" if best > last else ""
            found.append(Finding("good", f"{text}: the features are better than random ones{higher}."))
        else:
            found.append(Finding("warning", f"{text}: the features are no better than random ones."))
    stages = {name: run.curve(name) for name in sorted(keys_of(run, "cosine_distance/"))}
    if ends := [f"{points.values[0]:.2f} to {points.values[-1]:.2f}" for points in stages.values() if points]:
        text = f"Cosine distance between channels, by stage: {', '.join(ends)}. Towards 0 is feature collapse."
        found.append(Finding("note", text))
    return found


def keys_of(run: Run, prefix: str) -> set[str]:
    """Return the names of figures that begin so."""
    return {key for record in run.records for key in record if key.startswith(prefix)}


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
            rises = len(scores.values) < 2 or scores.values[best] > scores.values[0]
            found.append(Finding("good", f"{text}.") if rises else Finding("warning", f"{text}: as at first."))
    return found


def _data(run: Run) -> list[Finding]:
    found = []
    if waits := run.curve("data_wait"):
        share = waits.values.mean()
        text = f"{share:.0%} of the time was spent waiting for images"
        if share > MUCH_WAITING:
            remedy = "raise data.num_workers, or decode them once with fcmae prepare"
            found.append(Finding("warning", f"{text}: {remedy}."))
        else:
            found.append(Finding("good", f"{text}: loading keeps up."))
    if run.state and run.state.bad_images:
        names = ", ".join(name for _, name, _ in run.state.bad_images[:3])
        more = ", ..." if len(run.state.bad_images) > 3 else ""
        found.append(Finding("note", f"{len(run.state.bad_images)} images did not decode: {names}{more}."))
    return found
