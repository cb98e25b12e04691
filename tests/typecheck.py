"""The checker behind the shapes and types in lmu_dist's signatures; in tests only. An int may stand for a float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
