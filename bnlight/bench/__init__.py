"""Benchmarks whose numbers are ratios: everything that is compared runs interleaved on one machine."""
