"""A sweep over a policy's cuts, layers and fractions: what each plan costs in accuracy and gains in time."""
