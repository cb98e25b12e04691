"""Runtime type checker for the shape and type annotations of lmu_dist, used in tests only. An int is accepted as a float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
