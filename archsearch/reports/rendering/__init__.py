"""HTML pages, tables and number formats; this package knows nothing about studies."""
