"""Parts of reports: charts as data, drawn by Plotly (HTML) or Matplotlib (PNG), and the page."""
