"""Commands of `mfjax`: one module each, with a docstring and `main(argv)`."""
