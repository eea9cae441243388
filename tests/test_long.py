"""What is left out of `make test` is still there."""

from tests.conftest import LONG


def test_tests_that_are_left_out_exist(request) -> None:
    names = {line.split("[")[0] for line in LONG if line}
    for name in names:
        file, function = name.split("::")
        assert f"def {function}(" in (request.config.rootpath / file).read_text(), name
