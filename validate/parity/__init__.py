"""Is a bundle the model it was made from? Its tensors, kept sets and answers beside the reference's."""
