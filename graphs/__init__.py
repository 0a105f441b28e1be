"""What a static, pruned, split model is: plan, budgets, FLOPs, decoder layers, importance scores, top-k gather, stages."""
