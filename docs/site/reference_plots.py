"""The plots of the reference logs in docs/results.md, as a report draws them; knows nothing of how they were run.

`python docs/site/reference_plots.py` writes docs/reference/NAME.png of each configs/reference/NAME.jsonl.
"""

from pathlib import Path

from matplotlib.figure import Figure

from fcmae.config import reference_logs
from fcmae.report.panels import learning
from fcmae.report.plots import draw_together
from fcmae.report.run import read_figures
from fcmae.tasks.known import TASKS
from fcmae.visualize import write_figure

PLOTS = Path(__file__).parents[1] / "reference"


def draw_log(log: Path) -> Figure:
    """Draw what says in the log of a pretraining or fine-tuning whether it learnt."""
    records = read_figures(log)
    recorded = {key for record in records for key in record}
    found = [task.scores for task in TASKS.values() if f"val_{task.scores.overall[0].key}" in recorded]
    return draw_together([*learning(records, next(iter(found), None))])


def plot_of(name: str) -> Path:
    """Return where the plot of a log lies."""
    return PLOTS / f"{name}.png"


if __name__ == "__main__":
    for name, log in reference_logs().items():
        plot_of(name).parent.mkdir(parents=True, exist_ok=True)
        write_figure(draw_log(log), plot_of(name))
        print(plot_of(name))
