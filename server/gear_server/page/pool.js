// A picture of the page pool: squares, in the order of the legend. A square stands for one page or for a few.

const STATES = ["sealed", "open", "cached", "free"];
const MOST_SQUARES = 900;
const HEIGHT = 126;

export function drawPool(canvas, pages, colour, scaleNote) {
  if (!pages.total) return;
  const perSquare = Math.ceil(pages.total / MOST_SQUARES);
  const squares = shares(pages, perSquare);
  const ratio = devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const { columns, pitch, gap } = grid(width, squares.length);
  const height = Math.ceil(squares.length / columns) * pitch - gap;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  const edge = (i) => Math.round(i * pitch * ratio); // whole device pixels: sharp at any zoom
  squares.forEach((state, i) => {
    const [x, y] = [i % columns, Math.floor(i / columns)];
    context.fillStyle = colour(state);
    context.fillRect(edge(x), edge(y), edge(x + 1) - edge(x) - gap * ratio, edge(y + 1) - edge(y) - gap * ratio);
  });
  scaleNote.textContent = `${pages.total.toLocaleString("en")} pages` + (perSquare > 1 ? `, ${perSquare} a square` : "");
}

/** One state for each square; whatever exists has at least one, and free ones fill up. */
function shares(pages, perSquare) {
  const squares = STATES.slice(0, -1).flatMap((state) => Array(Math.ceil(pages[state] / perSquare)).fill(state));
  const total = Math.max(Math.ceil(pages.total / perSquare), squares.length);
  return squares.concat(Array(total - squares.length).fill("free"));
}

/** The largest squares that fill rows of `width` and stay about `HEIGHT` high. */
function grid(width, num) {
  let columns = Math.ceil(width / 22);
  const gap = num > 500 ? 1 : 2;
  while (Math.ceil(num / columns) * ((width + gap) / columns) > HEIGHT + gap) columns += 1;
  return { columns, pitch: (width + gap) / columns, gap };
}
