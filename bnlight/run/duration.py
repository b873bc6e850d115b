"""Seconds in words."""


def duration(seconds: float) -> str:
    """Such as `45 s`, `3 min` or `2 h 10 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
