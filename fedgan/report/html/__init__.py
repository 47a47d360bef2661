"""Parts of the HTML reports: charts, tables, number formats, templates."""
