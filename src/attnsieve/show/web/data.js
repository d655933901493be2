"use strict";

// What the page holds, colours, and the masks' definition.

const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const FUTURE = [233, 233, 233];
const VIRIDIS = ["440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725"].map(rgb);
const CIVIDIS = ["00224e", "2a3f6d", "575d6d", "7d7c78", "a59c74", "d2c060", "fee838"].map(rgb);
const INK = ["ffffff", "0072b2", "00263d"].map(rgb);

function rgb(hex) {
  return [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

/** Colour at a share from 0 to 1 of the way along a list of colours. */
function along(colours, share) {
  const at = Math.min(Math.max(share, 0), 1) * (colours.length - 1);
  const low = Math.min(Math.floor(at), colours.length - 2);
  return colours[low].map((value, k) => Math.round(value + (at - low) * (colours[low + 1][k] - value)));
}

function percent(share) {
  if (share === null || share === undefined) return "-";
  const number = 100 * share;
  return `${number > 0 && number < 9.95 ? number.toFixed(1) : number.toFixed(0)} %`;
}

// Data: base64 of zlib streams, unpacked when first needed.

const unpacked = new Map();

function unpack(number) {
  if (!unpacked.has(number)) unpacked.set(number, inflate(data.blobs[number]));
  return unpacked.get(number);
}

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

/** Mean maps are stored as logarithms in 16 bits, 0 for 0, the lower triangle row by row. */
const LEVELS = Float32Array.from({ length: 65536 }, (_, code) =>
  code === 0 ? 0 : Math.exp(Math.log(data.floor) * (1 - (code - 1) / 65534)),
);

async function readMap(layer, head) {
  const number = data.maps[`${layer}:${head}`];
  if (number === undefined) return null;
  const codes = new Uint16Array(await unpack(number));
  return { size: data.pcl, value: (i, j) => LEVELS[codes[(i * (i + 1)) / 2 + j]] };
}

async function readRule(layer, head) {
  if (!data.rules) return null;
  const rule = data.rules[data.choice[layer][head]];
  const [end, offset, corner, table] = await Promise.all(
    ["end", "offset", "corner", "table"].map((part) => (rule[part] === null ? null : unpack(rule[part]))),
  );
  return {
    ...rule,
    end: new Int32Array(end),
    offset: offset && new Uint8Array(offset),
    corner: corner && new Uint8Array(corner),
    table: table && new Uint8Array(table),
  };
}

function bit(bits, at) {
  return (bits[at >> 3] >> (at & 7)) & 1;
}

/** Whether query i keeps key j: the definition of a layout's row. */
function keeps(rule, i, j) {
  if (j > i) return false;
  if (i < rule.rows) return bit(rule.corner, i * 8 * Math.ceil(rule.rows / 8) + j) === 1;
  if (i < rule.end[j]) return true;
  if (rule.offset && bit(rule.offset, i - j)) return true;
  if (!rule.table) return false;
  const [rows, keys] = rule.block;
  const across = Math.ceil(data.tokens / keys);
  return bit(rule.table, Math.floor(i / rows) * across + Math.floor(j / keys)) === 1;
}

function boxcox(value) {
  const { lam, eps } = data.boxcox;
  const grow = (x) => (lam === 0 ? Math.log(x) : Math.expm1(lam * Math.log(x)) / lam);
  return grow(Math.max(value, eps)) - grow(eps);
}
