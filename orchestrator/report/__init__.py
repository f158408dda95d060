"""Reports: figures from records, tables, plots, contact sheets, one self-contained page."""
