"""How the jobs of a sweep are chosen and where they run."""
