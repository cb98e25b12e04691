"""Planning: what a grid holds, what it costs and what it could tell, before anything runs. No Ray, no torch."""
