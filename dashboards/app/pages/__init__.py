"""The pages of the app, one a file: each turns a View into what is shown."""
