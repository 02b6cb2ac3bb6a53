"""HTML, tables, number formats; knows no study."""
