// Served in place of hls.js where that is not installed: the page then plays what the browser can play by itself.
