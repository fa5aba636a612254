"""The sections of the report, one a file: each turns results into HTML and figures, or says what to run."""
