"""Reports as one HTML file: what a page is made of (`page`), its charts (`charts`), what made it (`machine`)."""
