"""The models: what a family is made of, what it costs, and how a size becomes widths. Knows only torch and numpy."""
