"""The LMU mixer, the frozen Legendre memory it reads (legendre), and the forms in which both are computed."""
