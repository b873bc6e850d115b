"""bnlight: which normalization should my network use, at my batch size, on my GPUs?"""
