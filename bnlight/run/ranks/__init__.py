"""The ranks of a job: who starts them, which devices they have, and that they agree."""
