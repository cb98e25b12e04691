"""Plans a study before anything runs: the cells of its grid, their cost, and the statistical power. Does not need Ray."""
