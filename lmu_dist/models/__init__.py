"""Language models of all families: networks, costs, and widths for a requested size. Needs only torch and numpy."""
