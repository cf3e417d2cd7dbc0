"""The commands of ``st-clp``, a module each; :mod:`st_clp.cli` puts them together."""
