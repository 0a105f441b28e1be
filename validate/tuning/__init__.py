"""A sweep over HiMAP's K1, R1, K2 and R2: what each plan costs in accuracy and gains in time."""
