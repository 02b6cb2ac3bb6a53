"""The Python interface: what each command does, as a function; the package `archsearch` exports all of it."""
