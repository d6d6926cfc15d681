/**
 * What README.md and docs/ show in TypeScript and JavaScript, against the package's own typings: every block is a module
 * that says `import … from 'memferry'` as a reader's would. That it does what the text says is for other tests.
 */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import ts from 'typescript';
import { describe, expect, test } from 'vitest';

const root = fileURLToPath(new URL('../..', import.meta.url));

/** What the text around a block says that the reader has. A name that a block declares itself is its own. */
const READER_HAS = `
  import type * as memferry from 'memferry';

  declare global {
    // A program that moves guests.
    const guest: memferry.Guest;
    const guests: memferry.Guest[];
    const pause: memferry.Guest['pause'];
    const unpause: memferry.Guest['unpause'];

    // docs/attach.md: what the owner has handed over.
    const pidfd: number;
    const uffd: number;
    const memory: number;
    const mappings: memferry.AttachOptions['mappings'];

    // docs/kvm.md: what the VMM knows of itself.
    const region: memferry.Region;
    const lengthBytes: number;
    const vmFd: number;

    // docs/firecracker.md.
    const socketPath: string;
    const apiSocket: string;
    const snapshot: string;
    const microVm: memferry.MicroVm;
    const onMicroVm: (microVm: memferry.MicroVm) => void;
  }
`;

/** Of a variable that a callback sets: in JavaScript nobody can say that it will have. */
const POSSIBLY_UNDEFINED = 18048;

interface Block {
  /** As an editor opens it. */
  file: string;
  /** Of its first line of code there, counted from 1. */
  line: number;
  language: 'ts' | 'js';
  code: string;
}

function blocksOf(file: string): Block[] {
  const text = readFileSync(join(root, file), 'utf8');
  return [...text.matchAll(/^```(\w*)\n([\s\S]*?)^```$/gm)]
    .filter(([, language]) => language === 'ts' || language === 'js')
    .map(({ 1: language, 2: code, index }) => ({
      file,
      line: text.slice(0, index).split('\n').length + 1,
      language: language as Block['language'],
      code: code as string,
    }));
}

const documents = ['README.md', ...readdirSync(join(root, 'docs')).map((name) => `docs/${name}`)];
const blocks = documents.filter((name) => name.endsWith('.md')).flatMap(blocksOf);

/** What is wrong with blocks: a line for each thing, by the document's own lines. */
function problemsOf(checked: readonly Block[]): string[] {
  const options: ts.CompilerOptions = {
    target: ts.ScriptTarget.ES2022,
    lib: ['lib.es2023.d.ts', 'lib.esnext.disposable.d.ts'],
    module: ts.ModuleKind.NodeNext,
    types: ['node'],
    typeRoots: [join(root, 'node_modules/@types')],
    strict: true,
    allowJs: true,
    checkJs: true,
    noEmit: true,
    skipLibCheck: true,
    // Examples in JavaScript write no types; where one is inferred it is checked.
    noImplicitAny: false,
    useUnknownInCatchVariables: false,
  };
  // They lie in the package, which so finds itself by its own name.
  const modules = new Map(
    checked.map((block, at) => [join(root, `block-${at}.${block.language === 'ts' ? 'mts' : 'mjs'}`), block]),
  );
  const ambient = join(root, 'reader-has.d.mts');
  const textOf = (name: string) => {
    const block = modules.get(name);
    return block ? `${block.code}\nexport {};\n` : name === ambient ? READER_HAS : undefined;
  };
  const host = ts.createCompilerHost(options);
  const { fileExists, readFile, getSourceFile } = host;
  host.fileExists = (name) => textOf(name) !== undefined || fileExists(name);
  host.readFile = (name) => textOf(name) ?? readFile(name);
  host.getSourceFile = (name, target, ...rest) => {
    const text = textOf(name);
    return text === undefined
      ? getSourceFile(name, target, ...rest)
      : ts.createSourceFile(name, text, target);
  };
  const program = ts.createProgram([ambient, ...modules.keys()], options, host);
  return ts.getPreEmitDiagnostics(program).flatMap(({ file, start = 0, code, messageText }) => {
    const why = ts.flattenDiagnosticMessageText(messageText, ' ');
    const block = file && modules.get(file.fileName);
    if (!block) return [`${file?.fileName ?? 'the compiler'}: ${why}`];
    if (block.language === 'js' && code === POSSIBLY_UNDEFINED) return [];
    return [`${block.file}:${block.line + file.getLineAndCharacterOfPosition(start).line}: ${why}`];
  });
}

describe('code in the documents', () => {
  test('has the types that the package says', { timeout: 60_000 }, () => {
    expect(blocks.length).toBeGreaterThan(10);
    expect(problemsOf(blocks)).toEqual([]);
  });

  // The check would find nothing if, say, all that is imported counted as any.
  test('is refused with an option that there is not, or one of another type', { timeout: 60_000 }, () => {
    const changed = (from: string, to: string) =>
      blocks
        .filter(({ code }) => code.includes(from))
        .map((block) => ({ ...block, code: block.code.replace(from, to) }));
    const misspelt = changed('secretFile:', 'secretfile:');
    const mistyped = changed("mode: 'hybrid'", "mode: 'hybird'");
    for (const wrong of [misspelt, mistyped]) expect(wrong.length).toBeGreaterThan(2);
    const places = problemsOf([...misspelt, ...mistyped]).map((problem) => problem.replace(/:\d+: .*/s, ''));
    expect(places.sort()).toEqual([...misspelt, ...mistyped].map(({ file }) => file).sort());
  });
});
