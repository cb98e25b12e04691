"""The LMU mixer (mixer), its frozen Legendre memory (legendre) and two implementations of the fused form (chunked, fourier)."""
