"""The words of the embedded collection, one module a language."""
