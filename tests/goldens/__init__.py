"""What runs gave before, kept: `make.py` says of what, `test_goldens.py` compares."""
