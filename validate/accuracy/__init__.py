"""Does a bundle still answer? Its plans over a data set, beside the unpruned model and chance."""
