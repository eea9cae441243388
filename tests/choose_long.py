"""Which tests `make test` leaves out, from what they took: every kind stays, its slow cases go to `make test-all`.

    python -m pytest -q -n 2 --durations=0 --durations-min=0 > LOG;  python -m tests.choose_long LOG

Of a parametrised test all cases above `SLOW` seconds go but the fastest; a test without cases goes above `VERY_SLOW`,
unless it is the only one of its kind (`KINDS`); what is left out and was not run stays out; laws stay for the entries
that cover every hook.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

from tests.contract.test_laws import COVER

SLOW, VERY_SLOW = 0.5, 5.0
KINDS = ("test_notebook_runs", "test_readme_code_runs", "test_killed_process", "test_anytime")


def seconds(log: str) -> dict[str, float]:
    """Of each test with its set-up, as pytest tells them."""
    found: dict[str, float] = defaultdict(float)
    for line in log.splitlines():
        if match := re.match(r"([0-9.]+)s (?:call|setup|teardown) +(tests/\S.*)", line):
            found[match[2].strip()] += float(match[1])
    return found


def left_out(took: dict[str, float]) -> list[str]:
    """Names of the tests that go."""
    kinds: dict[str, dict[str, float]] = defaultdict(dict)
    for name, value in took.items():
        kinds[name.split("[")[0]][name] = value
    out: list[str] = []
    for kind, cases in kinds.items():
        if kind.split("/")[-1].startswith("test_laws.py"):
            out += [name for name in cases if "[" in name and re.split(r"[\[\]-]", name)[1] not in COVER]
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
