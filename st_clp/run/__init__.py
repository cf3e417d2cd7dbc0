"""The whole method as one run, what it will cost, what each part of it gains, and what it is made of."""
