"""Mathematics that stands under several algorithms, as plain functions."""
