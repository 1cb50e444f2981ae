"""The statements of the paper, one a file: each puts what `theory` measured to its words and judges."""
