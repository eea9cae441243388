"""Which tests `make test` leaves out, from what they took: every kind stays, its slow cases go to `make test-all`.

    python -m pytest -q -n 2 --durations=0 --durations-min=0 > LOG;  python -m tests.choose_long LOG

Of a parametrised test all cases above `SLOW` seconds go but the fastest; a test without cases goes above `VERY_SLOW`,
unless it is the only one of its kind (`KINDS`); what is left out and was not run stays out. Laws stay for the entries
that cover every hook; of those that take more than `VERY_SLOW`, the two fastest stay. What was never logged, a law of a
new algorithm say, is not left out.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

from tests.contract.test_laws import COVER

SLOW, VERY_SLOW = 0.3, 1.5
LAWS = "contract/test_laws.py"
KINDS = (
    "test_notebook_runs",
    "test_readme_code_runs",
    "test_killed_process",
    "test_anytime",
    "test_fit_goes_on_in_its_directory",
)


def seconds(log: str) -> dict[str, float]:
    """Of each test with its set-up, as pytest tells them; of laws without, which they share."""
    found: dict[str, float] = defaultdict(float)
    for line in log.splitlines():
        if match := re.match(r"([0-9.]+)s (call|setup|teardown) +(tests/\S.*)", line):
            shared = LAWS in match[3] and match[2] != "call"
            found[match[3].strip()] += 0.0 if shared else float(match[1])
    return found


def case_of(name: str) -> str:
    """The entry that a law's test is of."""
    return re.split(r"[\[\]-]", name)[1]


def left_out(took: dict[str, float]) -> list[str]:
    """Names of the tests that go."""
    kinds: dict[str, dict[str, float]] = defaultdict(dict)
    for name, value in took.items():
        kinds[name.split("[")[0]][name] = value
    out: list[str] = []
    for kind, cases in kinds.items():
        if LAWS in kind:
            cover = sorted((name for name in cases if "[" not in name or case_of(name) in COVER), key=cases.__getitem__)
            kept = {name for i, name in enumerate(cover) if i < 2 or cases[name] <= VERY_SLOW}
            out += [name for name in cases if name not in kept]
        elif len(cases) == 1 and "[" not in next(iter(cases)):
            out += [name for name, value in cases.items() if value > VERY_SLOW and not kind.endswith(KINDS)]
        else:
            slow = sorted(name for name, value in cases.items() if value > SLOW)
            fastest = min(cases, key=lambda name: cases[name])
            if fastest in slow and (cases[fastest] < 4 * VERY_SLOW or kind.endswith(KINDS)):
                slow.remove(fastest)
            out += slow
    return sorted(out)


if __name__ == "__main__":
    took, kept = seconds(Path(sys.argv[1]).read_text()), Path(__file__).with_name("long.txt")
    not_run = {name for name in kept.read_text().split("\n") if name and name not in took}
    names = sorted({*left_out(took), *not_run})
    kept.write_text("".join(f"{name}\n" for name in names))
    total, gone = sum(took.values()), sum(took.get(name, 0) for name in names)
    print(f"{len(names)} of {len(took)} tests, {gone:.0f} of {total:.0f} seconds, are left out")
