"""One figure a file: an info function (trials -> numbers, no Plotly) and a plot function (numbers -> go.Figure)."""
