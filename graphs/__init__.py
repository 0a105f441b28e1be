"""What a static, pruned, split model is: plan, budgets, FLOPs, decoder layers, scores, top-k gather, stages."""
