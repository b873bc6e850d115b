"""What outlives a job's failure: the supervisor, the watchdog, and the lock on a job's directory."""
