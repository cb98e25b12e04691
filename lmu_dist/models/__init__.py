"""Language models of all families: their networks, their cost, and the widths for a requested size. Needs only torch and numpy."""
