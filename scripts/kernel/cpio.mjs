/** Writes an initramfs: a cpio archive in the "newc" format, as the kernel's own unpacker reads it. */

const ALIGN = 4;
const DIRECTORY = 0o040755;
const FILE = 0o100000;
const LINK = 0o120777;

/**
 * @param {{ path: string, content?: Buffer | string, link?: string, mode?: number }[]} entries `path` is absolute;
 * with `content` a file (`mode` 0o644 unless given), with `link` a symbolic link, else a directory. Directories
 * above an entry come by themselves.
 * @returns {Buffer}
 */
export function cpio(entries) {
  const parts = [];
  const known = new Set(['']);
  let inode = 1;
  const add = (name, mode, content) => {
    const nameBytes = Buffer.from(`${name}\0`);
    const fields = [inode++, mode, 0, 0, 1, 0, content.length, 0, 0, 0, 0, nameBytes.length, 0];
    const header = `070701${fields.map((field) => field.toString(16).padStart(8, '0')).join('')}`;
    parts.push(padded(Buffer.concat([Buffer.from(header), nameBytes])), padded(content));
  };
  const addDirectory = (name) => {
    if (known.has(name)) return;
    addDirectory(name.slice(0, Math.max(0, name.lastIndexOf('/'))));
    known.add(name);
    add(name, DIRECTORY, Buffer.alloc(0));
  };
  for (const { path, content, link, mode } of entries) {
    if (!path.startsWith('/') || path.includes('\0')) throw new Error(`cpio: '${path}' is no absolute path`);
    const name = path.slice(1).replace(/\/+$/, '');
    if (content === undefined && link === undefined) {
      addDirectory(name);
      continue;
    }
    addDirectory(name.slice(0, Math.max(0, name.lastIndexOf('/'))));
    if (known.has(name)) throw new Error(`cpio: ${path} comes twice`);
    known.add(name);
    if (link !== undefined) add(name, LINK, Buffer.from(link));
    else add(name, FILE | (mode ?? 0o644), Buffer.isBuffer(content) ? content : Buffer.from(content));
  }
  add('TRAILER!!!', 0, Buffer.alloc(0));
  return Buffer.concat(parts);
}

function padded(bytes) {
  const rest = bytes.length % ALIGN;
  return rest === 0 ? bytes : Buffer.concat([bytes, Buffer.alloc(ALIGN - rest)]);
}
