"""A package, so that another `tests` in site-packages (a baseline brings one) does not hide it."""
