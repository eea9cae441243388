"""One algorithm a file; their factories are names of `cl_zoo` itself."""
