"""The sample corpus: a generated world of coloured shapes with known truth."""
