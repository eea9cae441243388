"""The project's own pages say what is so."""

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from cl_zoo._catalogue import catalogue, layer_table, table
from experiments import ledger
from experiments.published import FIGURES, Figure
from tests.tiny_tfds import write_images

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("marker", "table"), [("catalogue", table), ("layers", layer_table)])
def test_readme_shows_the_catalogues(marker: str, table: Callable[[], str]) -> None:
    shown = re.search(rf"<!-- {marker}.*?-->\n(.*?)\n<!-- end", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown and shown.group(1) == table()


def write_own_data(folder: Path) -> None:
    """What README's blocks read, and a package that is not installed here."""
    random = np.random.default_rng(0)
    rows = [f"{a:.2f},{b:.2f},{'ab'[i % 2]},{2024 + i // 40}" for i, (a, b) in enumerate(random.normal(size=(80, 2)))]
    (folder / "sales.csv").write_text("price,weight,kind,year\n" + "\n".join(rows))
    for name in ("cat", "cow", "dog", "owl"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(20):
            pixels = random.integers(0, 256, (8, 8, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{i}.png")
    (folder / "wandb.py").write_text(
        "told = []\ndef init(**_): pass\ndef log(values, step): told.append((step, values))\n"
    )


def test_readme_code_runs(tmp_path: Path) -> None:
    """Every block, one after another, in one process. The first and the last are made smaller."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 10
    write_own_data(tmp_path)
    shades = np.arange(420, dtype=np.uint16).astype(np.uint8)[:, None, None] * np.ones((28, 28), np.uint8)
    labels = np.arange(420) % 10
    write_images(tmp_path / "tfds_data", "fashion_mnist", (shades[:400], labels[:400]), (shades[400:], labels[400:]))
    blocks[0] = blocks[0].replace("steps=300", "steps=3").replace("(256, 256)", "(8,)")
    blocks[-1] = blocks[-1].replace("steps=200", "steps=5")
    blocks[-2] += (
        "\nassert len(wandb.told) >= 7 and np.isnan(fit(make(longer), longer, key, 'runs/mine').accuracy[2, 2])"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", "\n".join(blocks)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "NPROC": "2"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    told = result.stdout.splitlines()[-4:]
    assert all(re.fullmatch(r"EWC +\d+: 0\.\d{3}, 95 % interval 0\.\d{3} to [01]\.\d{3}", line) for line in told), told


def test_ledger_says_what_the_result_files_say() -> None:
    page = ledger.ledger()
    assert ledger.LEDGER.read_text() == page, "run: make ledger"
    assert ledger.README.read_text() == ledger.with_summary(ledger.README.read_text(), page), "run: make ledger"


@pytest.mark.parametrize(
    "entry", [entry for entry in catalogue().values() if entry.results], ids=lambda entry: entry.name
)
def test_every_reproduction_is_in_the_ledger(entry) -> None:
    assert f"| {entry.results} |" in ledger.LEDGER.read_text()


def ours(study: str, setting: str, algorithm: str) -> dict[str, float]:
    """Mean, standard deviation and n of a row of a result file."""
    rows = json.loads((ROOT / "experiments" / "results" / f"{study}.json").read_text())["rows"]
    (row,) = (row for row in rows if (row["setting"], row["algorithm"]) == (setting, algorithm))
    return row["ours"]


def above(one: dict[str, float], other: dict[str, float]) -> bool:
    """Welch's test, one-sided at 5 %."""
    moments = (m[field] for m in (one, other) for field in ("mean", "sd", "n"))
    return bool(stats.ttest_ind_from_stats(*moments, equal_var=False, alternative="greater").pvalue < 0.05)


def test_what_was_found_follows_from_the_rows() -> None:
    language = functools.partial(ours, "self_distillation")
    kept, mean = functools.partial(ours, "what_keeps_what"), functools.partial(ours, "weight_interpolation_full")
    learned, lost = "new skills", "forgetting per unit of gain"
    follows = {
        "dft": above(language(learned, "sft"), language(learned, "dft"))
        and above(language(lost, "dft"), language(lost, "sft")),
        "redo": not any(above(kept(s, "redo"), kept(s, "none")) for s in ("task", "class")),
        "weight_interpolation": not any(
            above(mean(f"buffer {n}", f"+ {how}"), mean(f"buffer {n}", "+ plain mean"))
            for n in (200, 500)
            for how in ("activations", "weights")
        ),
    }
    assert follows == {entry.name: True for entry in catalogue().values() if entry.found}


@pytest.mark.parametrize(
    ("ours", "published", "options", "found"),
    [
        ((90.5, 0.5, 10), (90.0, 0.5, 10), {}, "equivalent"),
        ((93.0, 0.5, 10), (90.0, 0.5, 10), {}, "better"),
        ((87.0, 0.5, 10), (90.0, 0.5, 10), {}, "worse"),
        ((87.0, 0.5, 10), (90.0, 0.5, 10), {"lower_is_better": True}, "better"),
        ((90.5, 5.0, 3), (90.0, 0.5, 10), {}, "inconclusive"),  # a wide spread is no reproduction
        ((90.5, None, 1), (90.0, 0.5, 10), {}, "inconclusive"),
        ((97.5, 0.1, 10), (96.0, 0.1, 10), {}, "better"),  # of 1 point
        ((1.20, 0.01, 10), (1.10, 0.01, 10), {"lower_is_better": True, "is_loss": True}, "worse"),  # of 5 %
        ((1.12, 0.01, 10), (1.10, 0.01, 10), {"lower_is_better": True, "is_loss": True}, "equivalent"),
        ((93.0, 0.5, 10), (90.0, None, None), {}, "better"),
    ],
)
def test_verdicts(ours: tuple, published: tuple, options: dict, found: str) -> None:
    mean, sd, n = ours
    figure = Figure(published[0], "a paper", "source read", *published[1:])
    assert ledger.verdict({"mean": mean, "sd": sd, "n": n}, figure, **options).word == found


def test_the_interval_is_that_of_welch() -> None:
    """Against SciPy's, from samples of those moments."""
    random = np.random.default_rng(0)
    ours, theirs = random.normal(90, 2, 5), random.normal(88, 1, 9)
    figure = Figure(theirs.mean(), "a paper", "source read", theirs.std(ddof=1), 9)
    found = ledger.verdict({"mean": ours.mean(), "sd": ours.std(ddof=1), "n": 5}, figure)
    wanted = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.9)
    np.testing.assert_allclose((found.low, found.high), wanted, rtol=1e-10)
    exact = ledger.verdict({"mean": ours.mean(), "sd": ours.std(ddof=1), "n": 5}, Figure(88.0, "a", "secondary"))
    wanted = stats.ttest_1samp(ours, 88.0).confidence_interval(0.9)
    np.testing.assert_allclose((exact.low + 88, exact.high + 88), wanted, rtol=1e-10)


def test_every_verdict_follows_from_what_is_stored() -> None:
    """Every row of the page, by the rule as its introduction states it; and the summary counts those that count."""
    rows = [line.split(" | ") for line in ledger.LEDGER.read_text().splitlines() if line.count(" | ") == 7]
    counted: dict[str, int] = {}
    for cells in rows:
        shown = re.match(r"(-?[\d.]+)(?: ± ([\d.]+))?(?: \(n (\d+)\))?$", cells[2])
        told = re.match(
            r"\(?(equivalent|better|worse|inconclusive)(?: †)?(?:, ([+-]\S+) to ([+-]\S+?))?[;)]?(?: |$)", cells[7]
        )
        if not shown or not told or told[2] is None:
            continue
        ours = [float(x) for x in cells[4].split(" ± ")]
        n, known = int(cells[5]), shown[2] is not None and shown[3] is not None
        v = [ours[1] ** 2 / n, float(shown[2]) ** 2 / int(shown[3]) if known else 0.0]
        df = sum(v) ** 2 / (v[0] ** 2 / (n - 1) + (v[1] ** 2 / (int(shown[3]) - 1) if known else 0)) if sum(v) else 1
        half = stats.t.ppf(0.95, df) * sum(v) ** 0.5
        d = ours[0] - float(shown[1])
        np.testing.assert_allclose((float(told[2]), float(told[3].rstrip(";)"))), (d - half, d + half), atol=0.06)
        if cells[3] in ("source read", "secondary"):
            counted[told[1]] = counted.get(told[1], 0) + 1
    assert sum(counted.values()) > 25
    for word, number in counted.items():
        assert f"| - {word} | {number} |" in ledger.LEDGER.read_text()


def test_every_published_figure_says_where_it_was_read() -> None:
    for cells in FIGURES.values():
        for figure in cells.values():
            assert figure.read in ("source read", "secondary", "recalled") and len(figure.source) > 10
            assert figure.sd is None or figure.n


def test_studies_refuse_unknown_and_impossible_values() -> None:
    for arguments, said in (
        (["--protocol", "none_such"], "none_such"),
        (["--no-such-field", "1"], "no-such-field"),
        (["--seeds", "0"], "seeds is 0"),
    ):
        command = [sys.executable, "-m", "experiments.split_mnist", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert result.returncode != 0
        assert said in result.stderr + result.stdout


def test_nothing_is_ever_unpickled() -> None:
    for path in [*ROOT.glob("cl_zoo/**/*.py"), *ROOT.glob("experiments/**/*.py")]:
        text = path.read_text()
        assert "pickle.load" not in text and "allow_pickle=True" not in text, path
        assert len(re.findall(r"np\.load\(", text)) == len(re.findall(r"np\.load\([^)]*allow_pickle=False", text)), path
