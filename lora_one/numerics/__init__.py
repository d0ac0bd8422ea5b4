"""Pure functions of tensors: truncated SVD, products, initial factors, preconditioner, angles."""
